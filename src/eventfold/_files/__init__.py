"""The engine on files: a directory of plain files, written by one process at a time and read by any number."""
