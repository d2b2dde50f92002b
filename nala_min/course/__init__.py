"""Code that the lessons in notebooks/ share, and the checkers of their exercises.

notebook.py sets up a notebook and shows figures and code. checks.py holds what students and
teachers call: it marks a file in a fresh process. exercises.py has a checker for each exercise in
notebooks/exercises, and diagnose.py what the checkers have in common.
"""
