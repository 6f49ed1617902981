"""The inspection service: a station with its products, its record of decisions, a server and a watched folder."""
