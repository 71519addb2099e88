package rpc

import (
	"context"
	"errors"

	"google.golang.org/grpc"
	"google.golang.org/protobuf/proto"

	v1 "github.com/diurnalog/diurna/rpc/v1"
)

const (
	// tailBytes is what a stream begins to read with and comes back to while
	// it follows the tail: a slow follower then pins little.
	tailBytes = 16 << 10

	// minStreamBytes is the least that ConsumeRequest.max_bytes can ask of a
	// stream. What is cut off a batch is read again for the next response, so
	// tiny responses out of large batches would be quadratic work.
	minStreamBytes = 64 << 10

	// unsentChunks is how many responses a stream whose client does not read
	// can hold: one that gRPC has begun to send, one queued behind it, one
	// being read.
	unsentChunks = 3
)

func (s *Service) consume(ctx context.Context, raw *rawRequest) (*rawResponse, error) {
	req, log, err := s.consumeRequest(ctx, raw)
	if err != nil {
		return nil, err
	}
	ctx, cancel := s.untilStopping(ctx)
	defer cancel()
	at, err := locate(ctx, log, req)
	if err != nil {
		return nil, s.orShutdown(ctx, err, nil)
	}
	most := 0
	if n := req.GetMaxBytes(); n > 0 {
		most = int(min(n, HardBatchBytes))
	}
	r := chunkReader{log: log, pool: &s.chunks}
	for {
		wait := at.from >= log.Bounds().HighWatermark
		if wait && req.GetFollow() && at.from < at.until {
			if err := log.WaitReadable(ctx, at.from); err != nil {
				return nil, s.orShutdown(ctx, err, &at.from)
			}
			continue
		}
		if wait || at.from >= at.until {
			return emptyResponse(at.from, log.Bounds().HighWatermark), nil
		}
		c, err := r.read(at, s.consumeAim(most), most)
		if at.movedBy(err) {
			continue
		}
		if err != nil {
			return nil, err
		}
		return c.response, nil
	}
}

func (s *Service) consumeStream(raw *rawRequest, stream grpc.ServerStream) error {
	req, log, err := s.consumeRequest(stream.Context(), raw)
	if err != nil {
		return err
	}
	ctx, cancel := s.untilStopping(stream.Context())
	defer cancel()
	at, err := locate(ctx, log, req)
	if err != nil {
		return s.orShutdown(ctx, err, nil)
	}

	s.consumers.Add(1)
	defer s.consumers.Add(-1)
	most := 0
	if n := req.GetMaxBytes(); n > 0 {
		most = int(max(min(n, HardBatchBytes), minStreamBytes))
	}
	r := chunkReader{log: log, pool: &s.chunks}
	size := s.consumeAim(most)
	for sent := false; ; {
		if ctx.Err() != nil {
			return s.orShutdown(ctx, ctx.Err(), &at.from)
		}
		wait := at.from >= log.Bounds().HighWatermark
		done := at.from >= at.until || at.records == 0 || wait && !req.GetFollow()
		if !sent && (wait || done) {
			// Tells a reader that starts at the end where that is: only then
			// can it go on without a gap after a break.
			if err := stream.SendMsg(emptyResponse(at.from, log.Bounds().HighWatermark)); err != nil {
				return err
			}
			sent = true
		}
		if done {
			return nil
		}
		if wait {
			if err := log.WaitReadable(ctx, at.from); err != nil {
				return s.orShutdown(ctx, err, &at.from)
			}
			continue
		}

		c, err := r.read(at, min(size, s.consumeAim(most)), most)
		if at.movedBy(err) {
			continue
		}
		if err != nil {
			return err
		}
		atTail := c.next >= log.Bounds().HighWatermark
		if err := stream.SendMsg(c.response); err != nil {
			return err
		}
		sent = true
		// From here on the client has been given an offset to go on at.
		at.from, at.named = c.next, true
		at.records -= c.records
		if atTail {
			size = max(2*c.bytes, tailBytes)
		} else {
			size = min(4*size, HardBatchBytes)
		}
	}
}

// consumeRequest decodes and checks a request.
func (s *Service) consumeRequest(ctx context.Context, raw *rawRequest) (*v1.ConsumeRequest, Log, error) {
	req := new(v1.ConsumeRequest)
	if err := proto.Unmarshal(raw.data, req); err != nil {
		return nil, nil, &InvalidArgumentError{Field: "request", Detail: "is not a well-formed message"}
	}
	log, err := s.logFor(ctx, req.GetLog(), ActionConsume)
	if err != nil {
		return nil, nil, err
	}
	return req, log, checkConsume(req)
}

// movedBy says whether err only means that retention has overtaken a start
// that the client did not name, and moves it along then.
func (at *span) movedBy(err error) bool {
	var gone *OffsetOutOfRangeError
	if at.named || !errors.As(err, &gone) || gone.First <= at.from {
		return false
	}
	at.from = gone.First
	return true
}

// consumeAim is what one response aims at: most or, without it, the server's
// own aim, and less where so many streams are open that their unsent responses
// would not stay within the memory for them.
func (s *Service) consumeAim(most int) int {
	aim := s.limits.ConsumeBytes
	if most > 0 {
		aim = most
	}
	share := s.limits.ConsumeMemory / int(max(s.consumers.Load(), 1)) / unsentChunks
	return max(min(aim, share), tailBytes)
}

// untilStopping derives a context that also ends when the server begins to
// shut down.
func (s *Service) untilStopping(ctx context.Context) (context.Context, context.CancelFunc) {
	ctx, cancel := context.WithCancelCause(ctx)
	stop := context.AfterFunc(s.stopping, func() { cancel(errStopping) })
	return ctx, func() { stop(); cancel(nil) }
}

var errStopping = errors.New("the server is stopping")

// orShutdown replaces an error that only shows that the server is shutting
// down by one that tells the reader where to go on.
func (s *Service) orShutdown(ctx context.Context, err error, next *uint64) error {
	if errors.Is(context.Cause(ctx), errStopping) && errors.Is(err, context.Canceled) || errors.Is(err, ErrClosed) {
		return &shutdownError{next: next}
	}
	return err
}
