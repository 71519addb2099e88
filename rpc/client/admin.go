package client

import (
	"context"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// What operators ask for. Any node takes these calls and passes them on to the
// leader where that is needed. An *Error whose Definite is false means that the
// change may have been made: ListPeers tells. No change is sent twice.

// ListPeers lists the nodes of the cluster as its leader knows them, or, with
// stale, as the node that is asked does, which works without a leader.
func (c *Client) ListPeers(ctx context.Context, stale bool) (ServerList, error) {
	var resp v1.ListPeersResponse
	if err := c.ask(ctx, v1.Admin_ListPeers_FullMethodName, &v1.ListPeersRequest{Stale: stale}, &resp); err != nil {
		return ServerList{}, err
	}
	return serverList(resp.AnsweredBy, resp.Servers), nil
}

// AddPeer adds a node, which becomes a voter when it has caught up, or changes
// the address of one that is there. It returns how many voters there are then;
// known is false where that could not be found out.
func (c *Client) AddPeer(ctx context.Context, id, address string) (voters int, known bool, err error) {
	var resp v1.AddPeerResponse
	if err := c.change(ctx, v1.Admin_AddPeer_FullMethodName, &v1.AddPeerRequest{Id: id, Address: address}, &resp); err != nil {
		return 0, false, err
	}
	return int(resp.GetVoters()), resp.Voters != nil, nil
}

// RemovePeer removes a node for good. It fails with WOULD_LOSE_QUORUM where
// what is left could not agree on anything. It returns what AddPeer does.
func (c *Client) RemovePeer(ctx context.Context, id string) (voters int, known bool, err error) {
	var resp v1.RemovePeerResponse
	if err := c.change(ctx, v1.Admin_RemovePeer_FullMethodName, &v1.RemovePeerRequest{Id: id}, &resp); err != nil {
		return 0, false, err
	}
	return int(resp.GetVoters()), resp.Voters != nil, nil
}

// TransferLeadership hands leadership to the voter of this id, or to the one
// that is furthest along where id is empty.
func (c *Client) TransferLeadership(ctx context.Context, id string) error {
	return c.change(ctx, v1.Admin_TransferLeadership_FullMethodName, &v1.TransferLeadershipRequest{Id: id}, new(v1.TransferLeadershipResponse))
}

// Leave makes a node leave the cluster and returns its id once it is out. The
// client must have been made for one address, that of the node. With an id, any
// other node at this address refuses.
func (c *Client) Leave(ctx context.Context, id string) (left string, err error) {
	if len(c.endpoints) != 1 {
		return "", invalid("several addresses are given: it must be clear which node is to leave")
	}
	var resp v1.LeaveResponse
	if err := c.change(ctx, v1.Admin_Leave_FullMethodName, &v1.LeaveRequest{Id: id}, &resp); err != nil {
		return "", err
	}
	return resp.GetId(), nil
}
