from pathlib import Path


def write_report(folder, train, groups):
    p = Path(folder) / "report.html"
    p.write_text("x")
    return p
