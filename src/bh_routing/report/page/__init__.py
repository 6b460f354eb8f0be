"""report.html: one file that opens from disk, made from the files of a run."""
