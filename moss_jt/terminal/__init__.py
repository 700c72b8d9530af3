"""What moss-jt chat shows: screen, line input, pictures, texts."""
