-- Begin the grace of queued nodes anew, because their messages are still being sent.
-- A node that was claimed meanwhile no longer waits, and stays as it is.
-- ARGV: nodes.   Returns 1.
local members = {}
for i, id in ipairs(ARGV) do
  members[2 * i - 1], members[2 * i] = now, id
end
call('ZADD', waiting, 'XX', unpack(members))
return 1
