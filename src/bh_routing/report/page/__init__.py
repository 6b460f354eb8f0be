"""report.html: a single self-contained file, made from the files of a run."""
