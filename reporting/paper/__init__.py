"""The paper's numbers beside our records: cells, tables and figures. Start at page.py."""
