"""Whether llguidance can build a grammar: asked in a worker process, for some take it minutes.

This module is also what runs there, so it imports nothing of gemlax.
"""

from typing import Any

__all__ = ["answer"]


def answer(question: dict[str, Any]) -> dict[str, object]:
    """Return {"error": text}, empty for a grammar that can be built, and warnings."""
    import llguidance

    limits = llguidance.LLParserLimits(verbose_errors=False)
    failed, said = llguidance.LLMatcher.validate_grammar_with_warnings(
        question["grammar"], limits=limits
    )
    if failed:
        return {"error": said[0], "warnings": []}
    # Ids of control tokens are what only a vocabulary can tell.
    return {"error": "", "warnings": [one for one in said if not one.startswith("no tokenizer")]}
