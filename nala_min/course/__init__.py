"""The course of notebooks/: what its notebooks share, and what marks its exercises.

notebook.py: how a notebook begins, shows a figure and shows code. checks.py: the checking engine,
which students and teachers call. marking.py: the fresh process in which a file is marked.
lesson_1.py to lesson_7.py and find_the_bug.py: the checkers of the file of that name in
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
