"""Compare ways of tuning one model on one task at equal budget, and say in plain words which pays off.

    from luthier.compare import compare, report, table
    document = compare("reviews.csv", "minilm", "probe, full, lora(rank=8)", seeds=3, out="runs/a")   # results.json
    print(table.show(document))                                                                       # the terminal's table
    report.write(document, "runs/a")                                                                  # report.html, pareto.png
"""

__all__ = ["compare"]


def __getattr__(name):
    if name != "compare":
        raise AttributeError(f"module 'luthier.compare' has no attribute {name!r}")
    from .run import compare

    return compare
