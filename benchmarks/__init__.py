"""Studies in worlds of our own making: each is one command and prints the tables it claims."""
