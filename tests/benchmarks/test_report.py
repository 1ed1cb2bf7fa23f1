from benchmarks import report


def test_the_readme_holds_the_measured_figures():
    page = (report.ROOT / "README.md").read_text()
    assert report.render(page) == page
