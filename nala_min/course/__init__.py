"""Code that the lessons in notebooks/ share, and the checkers of their exercises.

notebook.py sets up a notebook and shows figures and code. Students and teachers call checks.py,
which marks a file in a fresh process. exercises.py has the checkers, diagnose.py their tools.
"""
