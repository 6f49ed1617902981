"""From scores to decisions: conformal thresholds and regions."""
