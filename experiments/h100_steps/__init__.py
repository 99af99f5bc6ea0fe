"""The steps of experiments/h100_bench.py, a file each with `run(bench)`.

`bench.py`, `loops.py` and `launches.py` serve them; `ledger.py` lists them and `report.py` writes the page.
"""
