package agent

import (
	"context"
	"errors"
	"os"
	"os/exec"
	"regexp"
	"strings"
	"testing"
	"time"
)

// alone runs a script in a network of its own, where nobody else has the ports
// that the README's commands use, in the project's top folder. What it starts ends
// with it, in whatever way that ends: it is all there is in its PID namespace.
func alone(t *testing.T, script string, env ...string) string {
	t.Helper()
	unshare := []string{"unshare", "--net", "--pid", "--fork", "--kill-child", "--mount-proc"}
	if os.Geteuid() != 0 {
		unshare = append(unshare, "--map-root-user")
	}
	if err := exec.Command(unshare[0], append(unshare[1:], "ip", "link", "set", "lo", "up")...).Run(); err != nil {
		t.Skipf("no network of its own for the README's ports here: %s: %v", strings.Join(unshare, " "), err)
	}
	ctx, cancel := context.WithTimeout(t.Context(), 3*time.Minute)
	defer cancel()
	cmd := exec.CommandContext(ctx, unshare[0], append(unshare[1:], "bash", "-euo", "pipefail", "-c", "ip link set lo up\n"+script)...)
	cmd.Dir = ".."
	cmd.Env = append(os.Environ(), env...)
	cmd.WaitDelay = 20 * time.Second
	var stderr strings.Builder
	cmd.Stderr = &stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("%v\n%s\n%s", errors.Join(err, ctx.Err()), out, stderr.String())
	}
	return string(out)
}

// readmeBlocks returns the commands under a heading of the README.
func readmeBlocks(t *testing.T, heading string) []string {
	t.Helper()
	page, err := os.ReadFile("../README.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, found := strings.Cut(string(page), "\n## "+heading+"\n")
	if !found {
		t.Fatalf("README.md has no part %q", heading)
	}
	section, _, _ = strings.Cut(section, "\n## ")
	return fenced(section, "sh")
}

// try starts $RUN, waits until it has written what $UNTIL matches, runs $TRY, and
// presses Ctrl-C.
const try = `
log=$(mktemp)
trap 'rm -f "$log"' EXIT
# A process group that Ctrl-C reaches, as a terminal's.
setsid env --default-signal=INT bash -c "$RUN" >"$log" 2>&1 &
started=$!
trap 'kill -INT -- -$started 2>/dev/null || true; wait; rm -f "$log"' EXIT
until grep -q "$UNTIL" "$log"; do
  kill -0 $started 2>/dev/null || { cat "$log" >&2; exit 1; }
  sleep 0.2
done
if [ -z "$TRY" ]; then
  # What it says to try itself; without dig, without that.
  TRY=$(sed -n '/In another terminal/,/^[A-Z].*:$/p' "$log" | grep '^    ')
  command -v dig >/dev/null || TRY=$(printf '%s\n' "$TRY" | grep -v '^ *dig ')
fi
LOG=$log bash -euo pipefail -c "$TRY"
kill -INT -- -$started
code=0
wait $started || code=$?
[ "$code" = 0 ] || [ "$code" = 2 ] || [ "$code" = 130 ] || { echo "it ended with $code" >&2; cat "$log" >&2; exit 1; }
# Nothing is left: nobody else is in this network.
for port in 8400 8402 8410 8420 8500; do
  if (exec 3<>/dev/tcp/127.0.0.1/$port) 2>/dev/null; then echo "port $port still answers" >&2; exit 1; fi
done
trap 'rm -f "$log"' EXIT
`

// TestReadme runs what the README says to try, as it stands there.
func TestReadme(t *testing.T) {
	t.Run("a node", func(t *testing.T) {
		blocks := readmeBlocks(t, "Try it")
		if len(blocks) != 2 {
			t.Fatalf("%d blocks", len(blocks))
		}
		out := alone(t, try, "RUN="+typed(blocks[0]), "UNTIL=Ready", "TRY="+blocks[1])
		lines := strings.Fields(out)
		if len(lines) != 5 || lines[0] != "100000" || lines[1] != lines[3] {
			t.Errorf("printed %q, want 100000 and a checksum twice", out)
		}
	})
	for _, line := range strings.Split(strings.TrimSpace(strings.Join(readmeBlocks(t, "Try a cluster"), "")), "\n") {
		t.Run(typed(line), func(t *testing.T) {
			out := alone(t, try, "RUN="+typed(line), "UNTIL=^Ctrl-C", "TRY=")
			for _, want := range []string{"100000\n", `"name":"n1"`, `diurna_log_next_offset{log="default"} 100000`} {
				if !strings.Contains(out, want) {
					t.Errorf("%q is not in what the commands printed, which begins with\n%s", want, out[:min(len(out), 4<<10)])
				}
			}
		})
	}
}

// TestReadmeDeploys: what the README says of Docker and Nomad is what their own
// pages say, whose commands TestCompose and TestNomadLife try.
func TestReadmeDeploys(t *testing.T) {
	known := map[string]bool{}
	for _, name := range []string{"compose.md", "nomad.md"} {
		page, err := os.ReadFile("../docs/" + name)
		if err != nil {
			t.Fatal(err)
		}
		for _, block := range fenced(string(page), "sh") {
			for line := range strings.Lines(block) {
				known[typed(line)] = true
			}
		}
	}
	tried := 0
	for _, block := range readmeBlocks(t, "Deploy it") {
		for line := range strings.Lines(block) {
			for part := range strings.SplitSeq(line, " && ") {
				tried++
				if !known[typed(part)] {
					t.Errorf("%q is on no page that is tried", typed(part))
				}
			}
		}
	}
	if tried < 6 {
		t.Errorf("%d commands were found", tried)
	}
}

var comment = regexp.MustCompile(`\s+#.*`)

// typed is what one types of a line: it without the comment behind it.
func typed(line string) string { return comment.ReplaceAllString(strings.TrimSpace(line), "") }

// TestLookingGuide runs what docs/operations.md says about looking at a cluster, as
// it stands there: in plaintext, and what needs files, with TLS.
func TestLookingGuide(t *testing.T) {
	page, err := os.ReadFile("../docs/operations.md")
	if err != nil {
		t.Fatal(err)
	}
	_, section, _ := strings.Cut(string(page), "\n## Looking at it\n")
	section, _, _ = strings.Cut(section, "\n## ")
	var plain, secured []string
	for _, block := range fenced(section, "sh") {
		for line := range strings.Lines(block) {
			if strings.Contains(line, "https:") {
				secured = append(secured, typed(line))
			} else {
				plain = append(plain, typed(line))
			}
		}
	}
	if len(plain) < 5 || len(secured) < 1 {
		t.Fatalf("found %q and %q", plain, secured)
	}
	out := alone(t, try, "RUN=make cluster", "UNTIL=^Ctrl-C", "TRY=PATH=$PWD/bin:$PATH\n"+strings.Join(plain, "\n"))
	for _, want := range []string{"SERVING", "healthy", `"ready":`} {
		if !strings.Contains(out, want) {
			t.Errorf("%q is not in what is printed:\n%s", want, out)
		}
	}
	files := strings.NewReplacer("ca.pem", "$DIURNA_CACERT", "me.pem", "$DIURNA_CLIENT_CERT", "me-key.pem", "$DIURNA_CLIENT_KEY")
	out = alone(t, try, "RUN=TLS=1 make cluster", "UNTIL=^Ctrl-C", `TRY=eval "$(grep -o 'export DIURNA_.*' "$LOG")"`+"\n"+files.Replace(strings.Join(secured, "\n")))
	if !strings.Contains(out, `"name":"n1"`) {
		t.Errorf("by HTTPS: %s", out)
	}
}
