"""MLflow: tracking, the gate, promotion, lineage, and the served model."""
