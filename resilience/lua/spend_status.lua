-- Read a budget.  Returns {open account, JSON, ...} and {label, JSON: unit -> amount, ...}.
return {call('HGETALL', accounts), call('HGETALL', labels)}
