"""Reading and writing of results folders, shared by experiments and analysis."""
