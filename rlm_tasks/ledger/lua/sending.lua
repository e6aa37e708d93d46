-- Begin the grace of queued nodes anew, because their messages are still being sent.
-- A node that was claimed meanwhile no longer waits, and stays as it is.
-- ARGV: nodes.   Returns the number of nodes that still wait.
local found = 0
for _, id in ipairs(ARGV) do
  if call('ZSCORE', waiting, id) then
    call('ZADD', waiting, now, id)
    found = found + 1
  end
end
return found
