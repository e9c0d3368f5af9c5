"""report.html: everything a folder of results holds, in one file that a browser shows without a network."""
