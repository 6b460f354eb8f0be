"""Files of a results folder, written and read: the one place where both towers touch the disk."""
