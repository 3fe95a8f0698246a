"""The rows of data files as messages, whichever kind they are of.

row.py      columns, and the kinds that they tell    turn.py     turns of conversations
message.py  one message                              tools.py    functions and calls
"""

from jllama.text.messages.message import Learn, Message
from jllama.text.messages.row import COLUMNS, ignored, kind, row_messages

__all__ = ["COLUMNS", "Learn", "Message", "ignored", "kind", "row_messages"]
