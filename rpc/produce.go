package rpc

import (
	"context"
	"fmt"

	"google.golang.org/protobuf/types/known/timestamppb"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

// DefaultLog is the name of the log that is meant when a request names none.
const DefaultLog = "default"

// logFor finds the log of this name for a caller that wants to do something
// with it.
func (s *Service) logFor(ctx context.Context, name string, action Action) (Log, error) {
	if name == "" {
		name = DefaultLog
	}
	// Permission first: who may not read a log learns nothing about it, not
	// even whether it exists.
	if err := s.permit(ctx, action, name); err != nil {
		return nil, err
	}
	if name != DefaultLog {
		return nil, &LogNotFoundError{Log: name}
	}
	return s.log, nil
}

func (s *Service) produce(ctx context.Context, raw *rawRequest) (*v1.ProduceResponse, error) {
	req, err := parseProduceRequest(raw.data, s.limits)
	if err != nil {
		return nil, err
	}
	log, err := s.logFor(ctx, req.log, ActionProduce)
	if err != nil {
		return nil, err
	}
	pending, err := log.Propose(ctx, req.proposal(), false)
	if err != nil {
		return nil, err
	}
	ack, err := await(ctx, pending)
	if err != nil {
		return nil, err
	}
	return ackMessage(ack), nil
}

func (r *produceRequest) proposal() Proposal {
	return Proposal{Records: r.records, Count: r.count, Expected: r.expected}
}

// await waits for an outcome. A call that ends first leaves the batch to its
// fate, which the caller must be told.
func await(ctx context.Context, p Pending) (Ack, error) {
	select {
	case <-p.Done():
		return p.Result()
	default:
	}
	select {
	case <-p.Done():
		return p.Result()
	case <-ctx.Done():
		return Ack{}, fmt.Errorf("%w: %w", ErrUnknownOutcome, ctx.Err())
	}
}

func ackMessage(ack Ack) *v1.ProduceResponse {
	return &v1.ProduceResponse{
		BaseOffset: ack.BaseOffset,
		NextOffset: ack.NextOffset,
		AppendTime: timestamppb.New(ack.AppendTime),
	}
}
