// Browsers start no worker for a page opened as a file. There the search runs in a hidden frame,
// which is given what a worker has: messages in by an event, and out by postMessage.
if (location.protocol === "file:") {
  class FrameWorker extends EventTarget {
    constructor(url) {
      super()
      this.frame = document.createElement("iframe")
      this.frame.hidden = true
      this.started = new Promise((started, failed) => {
        this.frame.addEventListener("load", () => {
          const inside = this.frame.contentWindow
          inside.postMessage = (data) => this.dispatchEvent(new MessageEvent("message", { data }))
          const script = inside.document.createElement("script")
          script.src = url
          script.onload = () => started(inside)
          script.onerror = () => failed(new Error(`not loaded: ${url}`))
          inside.document.body.append(script)
        }, { once: true })
      })
      this.frame.srcdoc = "<!doctype html><body>"
      document.body.append(this.frame)
    }

    async postMessage(data) {
      const inside = await this.started
      inside.dispatchEvent(new inside.MessageEvent("message", { data }))
    }

    terminate() {
      this.frame.remove()
    }
  }
  window.Worker = FrameWorker
}
