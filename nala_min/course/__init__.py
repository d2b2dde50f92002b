"""Code that the lessons in notebooks/ share (notebook.py), and the checkers of their exercises:
checks.py marks a file, with the checkers in exercises.py and the tools in diagnose.py."""
