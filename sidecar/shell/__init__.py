"""Sockets, files and time around the core; nothing here decides."""
