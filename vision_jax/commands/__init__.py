"""What each command of the command line does; main.py reads the flags."""
