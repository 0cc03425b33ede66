"""Rows of files and tables: read, made into prompts, written with their answers."""
