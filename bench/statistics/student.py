"""Student's t: intervals of the mean of a few values."""

import math
import statistics
from collections.abc import Sequence

# One-sided 95 % quantiles by degrees of freedom.
STUDENT_T_ONE_SIDED = {2: 2.920, 3: 2.353, 4: 2.132, 5: 2.015, 6: 1.943, 7: 1.895}
# Two-sided 95 % quantiles by degrees of freedom.
_STUDENT_T = {2: 4.303, 3: 3.182, 4: 2.776, 5: 2.571, 6: 2.447, 7: 2.365, 8: 2.306, 9: 2.262}


def half_interval(values: Sequence[float]) -> float:
    """Half the width of the 95 % interval of the mean of at least three values (Student's t)."""
    n = len(values)
    return _STUDENT_T.get(n - 1, _STUDENT_T[9]) * statistics.stdev(values) / math.sqrt(n)
