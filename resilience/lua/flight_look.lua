-- Poll as a waiter.  ARGV: id, lease ms, owner, id of the landing seen before.
-- Returns as flight_begin does.
local last = call('HGET', landed, 'id')
if last and last ~= ARGV[4] then return {'landed', call('HGET', landed, 'value'), 'flight'} end
return {make_or_wait(ARGV[1], tonumber(ARGV[2]), ARGV[3], 1), ARGV[4], ''}
