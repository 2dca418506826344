package mcp.authz

default allow = false

readers := ["read_schema", "list_tables"]

# An analyst looks at the shape of the data, not at the data.
allow if {
	input.user.role == "analyst"
	input.tool.name in readers
}

# An engineer queries as well, unless the call says that it destroys something.
allow if {
	input.user.role == "engineer"
	input.tool.name in array.concat(readers, ["execute_query"])
	not input.tool.args.destructive
}
