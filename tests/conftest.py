import json


def pytest_terminal_summary(terminalreporter):
    """What tests measured beside passing (`record_property`)."""
    for report in terminalreporter.getreports("passed"):
        if report.when == "call":
            for name, value in report.user_properties:
                terminalreporter.write_line(f"{name}: {json.dumps(value, indent=2)}")
