-- Wake a parked node before its time.  ARGV: node.   Returns 1, or 0 when it was not parked.
local id, node = ARGV[1], read(ARGV[1])
if not node or node.s ~= 'p' then return 0 end
node.rs = 0
wait_for_message(id, node)
keep(waiting)
return 1
