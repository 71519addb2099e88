package identity

import (
	"bytes"
	"encoding/json"
	"errors"
	"testing"
	"time"

	"github.com/hashicorp/go-hclog"
)

func TestAudit(t *testing.T) {
	var out bytes.Buffer
	a := NewAuditor(hclog.New(&hclog.LoggerOptions{Name: "diurna", Output: &out, JSONFormat: true}))
	a.Record(AuditEvent{
		Subject: "spiffe://orders.diurna/server/n1", OnBehalfOf: "alice\n2026-01-01 [INFO] forged", Verb: "remove-peer", Target: "n2",
		Outcome: "NO_LEADER", Error: errors.New("no leader"), Took: 1500 * time.Microsecond,
	})
	var got map[string]any
	if err := json.Unmarshal(out.Bytes(), &got); err != nil {
		t.Fatalf("%v: %s", err, out.String())
	}
	for key, want := range map[string]string{
		"@module": "diurna.audit", "@level": "info", "@message": "admin call", "subject": "spiffe://orders.diurna/server/n1",
		"on_behalf_of": "alice�2026-01-01 [INFO] forged", "verb": "remove-peer", "target": "n2", "outcome": "NO_LEADER", "error": "no leader",
	} {
		if got[key] != want {
			t.Errorf("%s is %v, want %s", key, got[key], want)
		}
	}
	out.Reset()
	a.Record(AuditEvent{Subject: "alice", Verb: "leave", Outcome: "ok"})
	if bytes.Contains(out.Bytes(), []byte("error")) || bytes.Contains(out.Bytes(), []byte("target")) {
		t.Errorf("%s", out.String())
	}
	NewAuditor(nil).Record(AuditEvent{})
}
