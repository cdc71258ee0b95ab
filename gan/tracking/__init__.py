"""Where the numbers and pictures of a run go: the screen, stats.jsonl, MLflow; all behind one small interface."""

from gan.tracking.console import Console, format_tick, format_time
from gan.tracking.jsonl import JsonlTracker
from gan.tracking.mlflow_tracker import MlflowTracker
from gan.tracking.tracker import Tracker, Trackers

__all__ = ["Console", "JsonlTracker", "MlflowTracker", "Tracker", "Trackers", "format_tick", "format_time"]
