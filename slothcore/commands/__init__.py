"""The commands of the command line, a file each: options to calls, and results to text.

torch takes a second to import, and so does much of slothcore; what only a running command needs is imported in it, so
that help and complaints come at once.
"""
