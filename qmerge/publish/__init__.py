"""A finished folder → a model on the Hub.

destination   may this token write there? checked before the merge begins
upload        the folder's files, their card with the model's id; goes on where an upload was interrupted
"""

from qmerge.publish.destination import Destination, check_destination
from qmerge.publish.upload import Pushed, push, push_merged

__all__ = ["Destination", "Pushed", "check_destination", "push", "push_merged"]
