"""Readers of files and folders, one for each format, and what tells the formats apart."""
