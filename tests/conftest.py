import json
import logging

# Logging is set up: runs in this process print no story. Tests of the story run scripts of their own.
logging.getLogger("trl_learnalign").addHandler(logging.NullHandler())


def pytest_terminal_summary(terminalreporter):
    """What tests measured beside passing (`record_property`)."""
    for report in terminalreporter.getreports("passed"):
        if report.when == "call":
            for name, value in report.user_properties:
                terminalreporter.write_line(f"{name}: {json.dumps(value, indent=2)}")
