"""Data at a site, for a client that cannot see it: arrays, tables and files, read and written."""
