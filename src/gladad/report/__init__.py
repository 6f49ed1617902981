"""Files of results, and the page of a report."""
