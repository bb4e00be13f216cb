"""The fair comparison's page and figures, from its records (docs/fair_comparison.md). Start at page.py."""
