"""Which layers of two networks of different depth belong together."""

from __future__ import annotations

from collections.abc import Sequence

__all__ = ["check_pairs", "ends", "spread"]


def check_pairs(student: Sequence[int] | None, teacher: Sequence[int] | None) -> list[tuple[int, int]] | None:
    """Returns pairs of blocks, None if neither network's are given.

    Args:
        student: blocks from 0.
        teacher: their partners.

    Raises:
        ValueError: only one is given, they differ in length, or are empty.
    """
    if student is None and teacher is None:
        return None
    if student is None or teacher is None or len(student) != len(teacher) or not student:
        raise ValueError(
            f"student_layers is {student} and teacher_layers {teacher}; give as many of one as "
            "of the other, or neither."
        )
    return list(zip(student, teacher, strict=True))


def ends(student_depth: int, teacher_depth: int, count: int = 4) -> list[tuple[int, int]]:
    """Pairs the first and the last few blocks: the shallow and the deep layers of manifold distillation.

    Args:
        student_depth: blocks of the student.
        teacher_depth: blocks of the teacher.
        count: blocks at each end, fewer in a shallow network.

    Example:
        >>> ends(12, 24)
        [(0, 0), (1, 1), (2, 2), (3, 3), (8, 20), (9, 21), (10, 22), (11, 23)]
        >>> ends(1, 3)
        [(0, 2)]
    """
    count = min(count, student_depth // 2, teacher_depth // 2)
    first = [(i, i) for i in range(count)]
    last = [(student_depth - i, teacher_depth - i) for i in range(max(count, 1), 0, -1)]
    return first + last


def spread(student_depth: int, teacher_depth: int) -> list[tuple[int, int]]:
    """Pairs every block of the student with the one at the same relative depth of the teacher.

    Args:
        student_depth: blocks of the student.
        teacher_depth: blocks of the teacher.

    Example:
        >>> spread(3, 6)
        [(0, 1), (1, 3), (2, 5)]
        >>> spread(2, 2)
        [(0, 0), (1, 1)]
    """
    return [(i, max(0, (i + 1) * teacher_depth // student_depth - 1)) for i in range(student_depth)]
