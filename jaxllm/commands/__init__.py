"""What each command does, a file each: run() takes what was typed and returns the exit code."""
