"""Files, ids, plugins and messages: everything that does not depend on the method."""
