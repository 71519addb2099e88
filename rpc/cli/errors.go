package cli

import (
	"errors"
	"fmt"
	"io"
	"strings"
	"syscall"

	"google.golang.org/grpc/codes"

	"github.com/diurnalog/diurna/rpc/client"
)

// failed tells about an error and returns the exit code for it.
func (m *Meta) failed(err error) int {
	m.errorf("%s", explain(err))
	var e *client.Error
	if errors.As(err, &e) {
		return ExitServer
	}
	return ExitUsage
}

// usage tells that verb was called wrongly.
func (m *Meta) usage(verb string, err error) int {
	text := err.Error()
	if !strings.HasSuffix(text, "?") {
		text += "."
	}
	m.errorf("%s Run `diurna %s -help` for what there is.", text, verb)
	return ExitUsage
}

// explain says what is the case and what to do next.
func explain(err error) string {
	var e *client.Error
	if !errors.As(err, &e) {
		return err.Error()
	}
	text, advice := e.Message, e.Advice
	switch e.Reason {
	case client.ReasonUnreachable:
		advice = "Is one running? Start one with `diurna agent -dev`, or name another with -addr or DIURNA_ADDR."
	case client.ReasonTLSFailed:
		advice = strings.TrimSpace(advice + " " + tlsAdvice(e.Metadata["cause"]))
	case client.ReasonNoCertificate:
		advice = "Give one with -client-cert and -client-key, or DIURNA_CLIENT_CERT and DIURNA_CLIENT_KEY."
	case client.ReasonConnectionLost:
		advice = "Is the node still up? `diurna status` tells."
	case client.ReasonNotLeader:
		if a := e.Metadata["leader_address"]; a != "" {
			advice = fmt.Sprintf("Try again, or ask the leader with -addr %s.", a)
		}
	case client.ReasonOffsetOutOfRange:
		first, ok1 := e.Uint("first")
		next, ok2 := e.Uint("next")
		if ok1 && ok2 {
			// The server's own words have the range in them, too.
			if offset, ok := e.Uint("offset"); ok {
				text = fmt.Sprintf("offset %d is out of range", offset)
			}
			advice = fmt.Sprintf("The log holds offsets %d up to, not including, %d: try -from %d, -from earliest or -from latest.", first, next, first)
		}
	case client.ReasonTimeout:
		advice = fmt.Sprintf("`diurna status -addr %s` tells whether the cluster has a leader.", e.Addr)
	}
	if e.Code == codes.Unimplemented {
		advice = "The node does not offer this: is it of the same version, and is it a Diurna node?"
	}
	if e.Reason != "" && e.Reason != client.ReasonUnreachable && e.Reason != client.ReasonConnectionLost {
		text += " (" + e.Reason + ")"
	}
	if advice == "" {
		return text
	}
	if !strings.HasSuffix(text, ".") {
		text += "."
	}
	return text + " " + advice
}

// tlsAdvice names the options that can help.
func tlsAdvice(cause string) string {
	switch cause {
	case client.CauseUntrusted:
		return "See -ca-file or DIURNA_CACERT."
	case client.CauseWrongName:
		return "See -tls-server-name or DIURNA_TLS_SERVER_NAME."
	case client.CauseRefused, client.CauseRequired:
		return "See -client-cert and -client-key, or DIURNA_CLIENT_CERT and DIURNA_CLIENT_KEY."
	case client.CausePlaintext:
		return "-tls=false connects without."
	case client.CauseTLS:
		return "See -ca-file, or DIURNA_CACERT."
	}
	return ""
}

// isClosedPipe reports whether a write failed because nobody reads any more.
func isClosedPipe(err error) bool {
	return errors.Is(err, syscall.EPIPE) || errors.Is(err, io.ErrClosedPipe)
}
