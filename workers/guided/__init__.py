"""Outputs that must match a grammar: which tokens may come next, from the grammar and the tokens so far.

notation   a client's schema, expression, choices or rules in the notation of llguidance
compiler   from there to something that masks can be made from, in threads of its own, kept by hash
matching   how far each sequence has come, and the masks of a step
afar       the same where another rank samples

No torch here: front doors compile as well, to refuse a bad grammar before any work is done for it.
"""

from __future__ import annotations

from workers.guided.afar import Afar, Opened
from workers.guided.compiler import CompiledGrammar, GrammarCompiler
from workers.guided.matching import Allowed, Matching
from workers.guided.notation import GrammarError

__all__ = ["Afar", "Allowed", "CompiledGrammar", "GrammarCompiler", "GrammarError", "Matching", "Opened"]
