"""All cases of docs/compatibility.md, in the order of the page."""

import compatibility_configs
import compatibility_files
import compatibility_mistakes
import compatibility_text
import compatibility_tuning

__all__ = ["CASES"]

CASES = [
    *compatibility_configs.CASES,
    *compatibility_files.CASES,
    *compatibility_text.CASES,
    *compatibility_tuning.CASES,
    *compatibility_mistakes.CASES,
]
