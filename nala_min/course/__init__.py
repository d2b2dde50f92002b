"""Code that the lessons in notebooks/ share, and the checkers of their exercises.

notebook.py sets up a notebook and shows figures and code. checks.py is the checking engine that
students and teachers call; marking.py runs it on a file in a fresh process. lesson_1.py to
lesson_7.py and find_the_bug.py hold the checkers for the files of the same names in
notebooks/exercises. Importing this package registers every exercise.
"""

from nala_min.course import lesson_1, lesson_2, lesson_3, lesson_4, lesson_5, lesson_6, lesson_7

# isort: split
from nala_min.course import find_the_bug

__all__ = [
    "find_the_bug",
    "lesson_1",
    "lesson_2",
    "lesson_3",
    "lesson_4",
    "lesson_5",
    "lesson_6",
    "lesson_7",
]
