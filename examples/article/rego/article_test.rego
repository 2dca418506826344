package mcp.authz_test

import data.mcp.authz

call(role, tool, args) := {"user": {"role": role}, "method": "tools/call", "tool": {"name": tool, "args": args}}

test_analyst_may_list_tables if authz.allow with input as call("analyst", "list_tables", {})

test_analyst_may_not_query if not authz.allow with input as call("analyst", "execute_query", {})

test_engineer_may_query if authz.allow with input as call("engineer", "execute_query", {"sql": "SELECT 1"})

test_engineer_may_not_destroy if {
	not authz.allow with input as call("engineer", "execute_query", {"destructive": true})
}

test_nobody_else_may_do_anything if not authz.allow with input as call("intern", "list_tables", {})
